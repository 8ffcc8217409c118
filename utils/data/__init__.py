"""From files to batches: rows (sources, shapes, adapters, preferences), stages (splits), token ids (encoding), batches
(loaders).
"""
