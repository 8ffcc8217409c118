"""What a training will hold in memory, and how long it takes, before anything is loaded."""
