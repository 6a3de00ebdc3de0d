"""The data owner's side: bottom and top, sampling, text, sessions and their recovery."""
