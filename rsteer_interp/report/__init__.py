"""From result folders to one self-contained page, and the typed reading of results that figures share."""
