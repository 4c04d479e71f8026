"""The normal form: one spelling for each thing, whatever the model's author wrote."""
