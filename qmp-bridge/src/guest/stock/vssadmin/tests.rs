//! Lists of writers in the shape in which `vssadmin` prints them.

use super::*;

const ENGLISH: &str = "vssadmin 1.1 - Volume Shadow Copy Service administrative command-line tool\r
(C) Copyright 2001-2013 Microsoft Corp.\r
\r
Writer name: 'Task Scheduler Writer'\r
   Writer Id: {d61d61c8-d73a-4eee-8cdd-f6f9786b7124}\r
   Writer Instance Id: {1bddd48e-5052-49db-9b07-b96f96727e6b}\r
   State: [1] Stable\r
   Last error: No error\r
\r
Writer name: 'SqlServerWriter'\r
   Writer Id: {a65faa63-5ea8-4ebc-9dbd-a0c4db26912a}\r
   Writer Instance Id: {4c4b8f52-1c0a-4a5c-8d4a-3a6b1a4d4f11}\r
   State: [9] Failed\r
   Last error: Timed out\r
";

#[test]
fn each_writer_has_its_state_and_its_last_error() {
    let found = writers(ENGLISH).unwrap();
    let names: Vec<&str> = found.iter().map(|w| w.name.as_str()).collect();
    assert_eq!(names, ["Task Scheduler Writer", "SqlServerWriter"]);
    let last = found.last().unwrap();
    assert_eq!(last.class_id, "a65faa63-5ea8-4ebc-9dbd-a0c4db26912a");
    assert_eq!(last.instance_id, "4c4b8f52-1c0a-4a5c-8d4a-3a6b1a4d4f11");
    assert_eq!((last.state, last.state_name()), (9, "FAILED_AT_FREEZE"));
    assert_eq!(last.last_error, "Timed out");
    assert!(found.first().unwrap().took_part() && !last.took_part());
}

#[test]
fn the_guests_language_does_not_matter() {
    let german = "Verfassername: \"System\"\nVerfasser: 'System Writer'\n   Verfasserkennung: {e8132975-6f93-4464-a53e-1050253ae220}\n   \
         Instanz: {0f3d9e0a-7f5a-4a51-9a4e-2b3c1d5e6f70}\n   Status: [5] Auf Abschluss warten\n   Letzter Fehler: Kein Fehler\n";
    let found = writers(german).unwrap();
    assert_eq!(found.len(), 1);
    assert!(found.iter().all(VssWriter::took_part));
}

#[test]
fn what_is_cut_or_no_list_is_no_list() {
    let end = ENGLISH.len();
    // Every cut that loses a line of the last writer.
    let last_line = ENGLISH.find("   Last error: Timed").unwrap();
    for cut in [last_line, last_line - 20, last_line - 60] {
        assert!(
            writers(ENGLISH.get(..cut).unwrap()).is_err(),
            "{cut} of {end}"
        );
    }
    assert!(writers("").is_err());
    assert!(writers("Error: Access denied.\n").is_err());
    assert!(writers(&ENGLISH.replace("[9]", "[x]")).is_err());
}
