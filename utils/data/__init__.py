"""From files to batches: rows (sources, shapes, adapters, preferences), stages (splits), token ids (tokens, encoding),
batches (collate, loaders); row by row with --streaming (raw, streamed_set, streaming).
"""
