"""Where examples come from: synthetic worlds, stores on disk, mixing buffers."""
