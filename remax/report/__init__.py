"""The report of a run, or of several: what their folders hold, as one HTML page without a network, and as Markdown."""
