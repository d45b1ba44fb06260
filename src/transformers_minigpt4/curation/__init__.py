"""Makes a stage-2 set: raw captions, repaired, filtered, reviewed by people, and built into a data set."""
