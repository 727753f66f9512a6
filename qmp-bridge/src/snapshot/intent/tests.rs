//! Records survive, locks exclude.

use super::super::document::{CreateRequest, Outcome, VmTarget};
use super::*;

fn document(started_unix_ms: u64) -> SetDocument {
    let vm = VmTarget {
        name: "vm".to_owned(),
        qmp: PathBuf::from("/run/qmp"),
        agent: None,
        vhost_blk: vec![PathBuf::from("/run/c")],
    };
    SetDocument::begin(
        Uuid::new_v4(),
        vm,
        CreateRequest::default(),
        started_unix_ms,
    )
}

#[test]
fn records_come_back_oldest_first_and_are_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDirectory::open(dir.path()).unwrap();
    let (newer, mut older) = (document(2), document(1));
    state.store(&newer).unwrap();
    state.store(&older).unwrap();
    older.outcome = Outcome::Kept;
    state.store(&older).unwrap();
    let (all, failures) = state.load_all().unwrap();
    assert_eq!(all, [older.clone(), newer.clone()]);
    assert!(failures.is_empty());
    state.remove(older.set).unwrap();
    state.remove(older.set).unwrap();
    assert!(matches!(
        state.load(older.set),
        Err(StateError::NotFound(_))
    ));
    assert_eq!(state.load(newer.set).unwrap(), newer);
}

#[test]
fn a_torn_record_is_reported_and_hides_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDirectory::open(dir.path()).unwrap();
    let good = document(1);
    state.store(&good).unwrap();
    let torn = dir
        .path()
        .join("sets")
        .join(format!("{}.json", Uuid::new_v4()));
    fs::write(&torn, "{\"format\":").unwrap();
    // What a writer that died before the rename leaves is no record.
    fs::write(torn.with_extension("new"), "{").unwrap();
    let (all, failures) = state.load_all().unwrap();
    assert_eq!(all, [good]);
    assert_eq!(failures.len(), 1);
    assert!(matches!(failures[0], StateError::Corrupted { .. }));
}

#[test]
fn one_vm_has_one_lock_under_all_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDirectory::open(dir.path()).unwrap();
    let socket = dir.path().join("qmp");
    fs::write(&socket, "").unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&socket, &link).unwrap();
    let lock = state.lock(&socket, Purpose::Sets).unwrap();
    assert!(lock.is_some());
    assert!(state.lock(&link, Purpose::Sets).unwrap().is_none());
    let other = dir.path().join("other");
    assert!(state.lock(&other, Purpose::Sets).unwrap().is_some());
    drop(lock);
    assert!(state.lock(&link, Purpose::Sets).unwrap().is_some());
}

#[test]
fn a_vm_that_has_ended_has_the_same_lock() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDirectory::open(dir.path()).unwrap();
    fs::create_dir(dir.path().join("run")).unwrap();
    // As /var/run is to /run.
    std::os::unix::fs::symlink("run", dir.path().join("var-run")).unwrap();
    let socket = dir.path().join("var-run/qmp");
    fs::write(&socket, "").unwrap();
    let lock = state.lock(&socket, Purpose::Sets).unwrap();
    assert!(lock.is_some());
    fs::remove_file(&socket).unwrap();
    assert!(state.lock(&socket, Purpose::Sets).unwrap().is_none());
    drop(lock);
    assert!(state.lock(&socket, Purpose::Sets).unwrap().is_some());
}

#[test]
fn a_restore_lets_a_revert_beside_it_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDirectory::open(dir.path()).unwrap();
    let socket = dir.path().join("qmp");
    let take = |purpose| state.lock(&socket, purpose).unwrap();
    let restore = take(Purpose::Restore).unwrap();
    assert!(take(Purpose::Sets).is_none());
    assert!(take(Purpose::Restore).is_none());
    let revert = take(Purpose::Revert).unwrap();
    assert!(take(Purpose::Revert).is_none());
    drop(restore);
    assert!(take(Purpose::Sets).is_none());
    drop(revert);
    let sets = take(Purpose::Sets).unwrap();
    assert!(take(Purpose::Sets).is_none());
    assert!(take(Purpose::Restore).is_none());
    assert!(take(Purpose::Revert).is_none());
    drop(sets);
    assert!(take(Purpose::Sets).is_some());
}

#[test]
fn a_lock_ends_with_its_holder_although_a_program_that_is_just_being_started_shares_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDirectory::open(dir.path()).unwrap();
    let socket = dir.path().join("qmp");
    let take = || state.lock(&socket, Purpose::Sets).unwrap();
    let lock = take().unwrap();
    // What a child has between its fork and its exec.
    let shared: Vec<File> = lock.files.iter().map(|f| f.try_clone().unwrap()).collect();
    drop(lock);
    assert!(take().is_some());
    drop(shared);
}

#[test]
fn paths_that_look_alike_have_different_locks() {
    assert_ne!(file_name(Path::new("/a/b")), file_name(Path::new("/a%2fb")));
    assert_ne!(file_name(Path::new("/a/b")), file_name(Path::new("/a-b")));
    assert_eq!(file_name(Path::new("/a.b")), "%2fa.b");
}
