"""The SDK of Penstock. Needs grpcio and protobuf only."""
