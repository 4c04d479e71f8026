"""Facts about a program; nothing here edits one."""
