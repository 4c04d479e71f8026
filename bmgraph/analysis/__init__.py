"""Facts about a program; nothing in this package edits one."""
