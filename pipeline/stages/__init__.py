"""What each job does, in a screen each: relabel, judge, evaluate, synthesize."""
