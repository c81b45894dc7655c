"""`make evidence`: the measurements of docs/evidence.md, stage by stage."""
