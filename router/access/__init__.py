"""Who may ask, and how much: API keys, their quotas, and the guards of both front doors."""
