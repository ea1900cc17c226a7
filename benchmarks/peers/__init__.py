"""The programs that are measured: the others, and the jobs that all of them run."""
