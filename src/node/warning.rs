//! The kinds of warnings in a node's status and history. Must never say what to do about one: that is in the sentence,
//! which the part that warns writes.

/// What a warning is about. There is at most one warning of each kind, and the status shows them in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Warning {
    /// Backups are not made, or not tidied up.
    Backup,
    /// Backups are not copied elsewhere.
    BackupCopies,
    /// A certificate expires soon.
    CertificateExpiry,
    /// The Console uses another certificate than it should.
    Certificates,
    /// The database cannot be opened for writing.
    Database,
    /// The disk is full, or nearly.
    Disk,
    /// Operations on the disk fail, or hang.
    DiskTrouble,
    /// This node's copy of the database cannot be trusted.
    Diverged,
    /// The certificate that was uploaded for all Consoles cannot be used on every host.
    GivenCertificate,
    /// The health port is not open.
    Health,
    /// The program of this host is too old or too new for the others.
    Level,
    /// A start has repaired files of the data folder.
    Mended,
    /// The Console's ports are not open.
    Ports,
    /// Entries of the raft log that no majority had were dropped and kept in a file.
    Rollback,
    /// The cluster key or the certificate authority cannot be replaced.
    Rotation,
    /// The scrub found a damaged page in the database file.
    Scrub,
    /// The service beside the Console does not stay up.
    Service,
    /// Files of the service's folder are on this host alone, or it cannot be served here.
    ServiceFiles,
    /// This node needs the whole database and cannot fetch it.
    Snapshot,
    /// Two processes use the identity of one node.
    DuplicateIdentity,
}

impl Warning {
    /// The word for it in events. Tools may rely on it, so it must not change.
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
            Self::Service => "service",
            Self::ServiceFiles => "service files",
            Self::Snapshot => "snapshot",
            Self::DuplicateIdentity => "twins",
        }
    }
}
