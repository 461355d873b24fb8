//! (owned by the database work)
#[derive(Debug)]
pub struct PrimaryDatabase {
    pub path: std::path::PathBuf,
    pub epoch: u64,
}
