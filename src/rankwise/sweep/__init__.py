"""Many runs at once: experiments compared, each run in a process of its own."""
