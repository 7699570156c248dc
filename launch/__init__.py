"""Start the processes of a run: :mod:`launch.local` on this host."""
