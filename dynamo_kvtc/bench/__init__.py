"""Speed cases. A case first proves its result right, then is timed."""
