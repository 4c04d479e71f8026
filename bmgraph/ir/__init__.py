"""The program as data: graphs, parameters and specs, and how they are edited, printed and checked."""
