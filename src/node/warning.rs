//! What a node warns of, in its status and its history. Must never say what is to be done about it: the sentence does,
//! which whoever warns writes.

/// What a warning is about; there is at most one of each. The order is the one in which they are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Warning {
    /// Backups are not made, or not tidied up.
    Backup,
    /// Backups are not copied elsewhere.
    BackupCopies,
    /// A certificate ends soon.
    CertificateExpiry,
    /// The Console serves another certificate than it should.
    Certificates,
    /// The database cannot be opened for writing.
    Database,
    /// The disk is full, or nearly.
    Disk,
    /// Operations on the disk fail, or do not come back.
    DiskTrouble,
    /// The copy of the database is not to be trusted.
    Diverged,
    /// The certificate that all Consoles were given cannot be used everywhere.
    GivenCertificate,
    /// The health port is not open.
    Health,
    /// The program of this host is too old or too new for the others.
    Level,
    /// What a start has mended.
    Mended,
    /// The Console's ports are not open.
    Ports,
    /// Entries of the raft log that no majority had were dropped and kept aside.
    Rollback,
    /// The cluster key or the certificate authority cannot be replaced.
    Rotation,
    /// A page of the database is not what it was.
    Scrub,
    /// The whole database cannot be fetched.
    Snapshot,
    /// Two processes use one identity.
    DuplicateIdentity,
}

impl Warning {
    /// As the history has it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::BackupCopies => "backup copies",
            Self::CertificateExpiry => "certificate expiry",
            Self::Certificates => "certificates",
            Self::Database => "database",
            Self::Disk => "disk",
            Self::DiskTrouble => "disk-trouble",
            Self::Diverged => "diverged",
            Self::GivenCertificate => "given certificate",
            Self::Health => "health",
            Self::Level => "level",
            Self::Mended => "mended",
            Self::Ports => "ports",
            Self::Rollback => "rollback",
            Self::Rotation => "rotation",
            Self::Scrub => "scrub",
            Self::Snapshot => "snapshot",
            Self::DuplicateIdentity => "twins",
        }
    }
}
