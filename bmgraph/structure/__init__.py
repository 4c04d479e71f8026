"""The sites of a model, found in the dataflow of its normal form; no name decides anything."""
