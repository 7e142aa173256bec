"""This process and others: those launched for one run, what they do together, and how a process is asked to stop."""
