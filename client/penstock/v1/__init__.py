"""Generated from proto/penstock/v1 by `make proto`. Not written by hand."""
