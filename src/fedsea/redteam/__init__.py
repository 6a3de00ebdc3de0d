"""The attacker, who sees exactly what the server sees."""
