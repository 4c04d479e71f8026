"""The step stage: forward, loss and backward of a program in one graph."""
