"""MoEfication: a dense feed-forward is split into experts."""
