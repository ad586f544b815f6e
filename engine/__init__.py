"""The engine: scheduler, block pool, paged KV cache, model, sampler. The scheduling half is pure; the rest is torch."""
