"""Pure vocabulary that every room shares. Imports nothing of ours, no torch, grpc or ray, and reads no clock."""
