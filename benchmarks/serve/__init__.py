"""`penstock bench serve`: an open-loop load generator for any server that speaks the OpenAI API, or ours by gRPC."""
