"""What all backends share on the way down."""
