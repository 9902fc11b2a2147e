"""The engine of long runs: the loop, data folders, what a run leaves on disk, several processes, memory, pretraining."""
