//! Daemon entry.
fn main() -> std::process::ExitCode {
    // First of all, so that the guard process stays as small as the program allows.
    if std::env::args_os().nth(1).is_some_and(|first| first == twistlock_ha::guard::SUBCOMMAND) {
        return twistlock_ha::guard::main();
    }
    std::process::ExitCode::SUCCESS
}
