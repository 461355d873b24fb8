//! Tests of the log on the real file system; tests/crash has those with a model of the disk.
