//! A folder that is served through FUSE, by real mounts. Needs root and /dev/fuse.

mod plain;
mod stage;
