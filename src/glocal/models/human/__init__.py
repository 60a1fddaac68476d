"""Networks of where people look and what they do."""
