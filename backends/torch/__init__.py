"""The torch backend: with an optimizer a program becomes a trainer, without one an engine on torch."""
