"""One operation a file, on tensors and ints: the torch reference, which runs on any device and judges all others."""
