"""What a training will hold in memory, before anything is loaded: parts by name, phases, the batch that fits."""
