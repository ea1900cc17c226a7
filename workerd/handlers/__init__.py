"""What runs the jobs: one module for each kind of handler."""
