"""MoEfication: splits a dense feed-forward into experts."""
