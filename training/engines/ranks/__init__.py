"""The ranks of a run: started on this machine, joined, and watched for one that is lost."""
