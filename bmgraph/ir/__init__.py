"""The program: its data, and how it is edited, printed and checked for legality."""
