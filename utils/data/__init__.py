"""From files to batches.

Rows (sources, shapes, adapters, preferences), stages (splits), token ids (tokens, encoding), batches (collate,
loaders); with --streaming row by row (raw, streamed_set, streaming). The config says what is wanted.
"""
