//! The script that makes a host a Defender, and the line that fetches it. Must never put anything into the script that
//! is not quoted, nor a secret but the token that its reader has or was just given.

use super::{JoinAssets, JoinAssetsError, fill, quote, quoted_list};
use crate::{
    cluster::{Membership, NodeId, program_version},
    pki::CONSOLE_NAME,
};

const TEMPLATE: &str = include_str!("../defender.sh.in");
const PROGRAM: &str = "defender";

impl JoinAssets {
    /// The script for a token that was checked and is in force until `until`, in seconds since 1970. Blocks as
    /// [`Self::program`] does.
    ///
    /// # Errors
    /// When the nodes have no HTTPS port or no port for Defenders, the cluster has no certificate authority, and when
    /// the program is not beside this one or cannot be read.
    pub fn defender_script(
        &self,
        membership: &Membership,
        primary: NodeId,
        token: &str,
        until: u64,
    ) -> Result<String, JoinAssetsError> {
        let ca = &membership.shared.authority.as_ref().ok_or(JoinAssetsError::NoAuthority)?.certificate;
        let port = self.defender_port.ok_or(JoinAssetsError::NoDefenderPort)?;
        let program = self.program(PROGRAM)?.ok_or(JoinAssetsError::NoProgram(PROGRAM))?;
        let values = [
            ("@TOKEN@", quote(token)),
            ("@ADDRESSES@", quoted_list(&self.addresses(membership, primary)?)),
            ("@PORT@", port.to_string()),
            ("@UNTIL@", until.to_string()),
            ("@VERSION@", quote(program_version())),
            ("@ARCHITECTURE@", quote(std::env::consts::ARCH)),
            ("@DEFENDER_SHA256@", quote(&program.sha256)),
            ("@KIB@", program.length.div_ceil(1024).to_string()),
            ("@CA@", quote(ca)),
            ("@CONSOLE_NAME@", quote(CONSOLE_NAME)),
        ];
        Ok(fill(TEMPLATE, &values))
    }

    /// The line to run on a host that is to become a Defender; see [`Self::line`].
    ///
    /// # Errors
    /// When the nodes have no HTTPS port, or the cluster has no certificate authority.
    pub fn defender_line(
        &self,
        membership: &Membership,
        primary: NodeId,
        token: &str,
    ) -> Result<String, JoinAssetsError> {
        self.line_for("defender.sh", membership, primary, token)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{invited, shell, sound},
        *,
    };
    use crate::config::Config;

    #[test]
    fn the_script_is_sound_and_names_all_members() {
        let (membership, token) = invited();
        let mut assets = JoinAssets::new(&Config::default());
        let dir = tempfile::tempdir().unwrap();
        assets.beside = dir.path().to_owned();
        let missing = assets.defender_script(&membership, 2, &token, 1).unwrap_err().to_string();
        assert!(missing.contains("no program defender"), "{missing}");
        std::fs::write(dir.path().join(PROGRAM), "#!/bin/sh\necho \"$@\"\n").unwrap();
        let script = assets.defender_script(&membership, 2, &token, u64::MAX >> 1).unwrap();
        let path = sound(dir.path(), &script);
        let look = |what: &str| shell(&format!(". {}; {what}", path.display()));
        assert_eq!(look("printf '%s ' \"${ADDRESSES[@]}\" $PORT"), "[2001:db8::2]:8083 192.0.2.1:8083 8084 ");
        // All but the fetching.
        let run = |options: &str| {
            let ready =
                format!("prepare() {{ bin={0} packaged=true work={0} options=({options}); }}", dir.path().display());
            look(&format!("{ready}; provide() {{ chmod 755 {}/defender; }}; main", dir.path().display()))
        };
        let usual = "install --token-file WORK/token --port 8084 ".replace("WORK", &dir.path().display().to_string());
        let members = "--console [2001:db8::2]:8083 --console 192.0.2.1:8083";
        assert_eq!(run("--name x").trim_end(), format!("{usual}{members} --name x"));
        assert_eq!(run("--console lb:8083").trim_end(), format!("{usual}--console lb:8083"));
        assert_eq!(std::fs::read_to_string(dir.path().join("token")).unwrap(), format!("{token}\n"));

        let line = assets.defender_line(&membership, 1, &token).unwrap();
        assert!(line.ends_with("https://console.twistlock.internal/api/v1/scripts/defender.sh | sudo bash"), "{line}");
    }
}
