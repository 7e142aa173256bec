"""What a command does where that is more than a call or two; `api` and `cli` call these."""
