//! What a document may not say.

use super::*;

fn document() -> Metadata {
    let mut database = Component::database("main", "orders");
    database.database_files = vec![FileSet::new("/srv/db", "orders.db")];
    database.log_files = vec![FileSet::new("/srv/db", "orders.db-wal")];
    Metadata {
        restore_method: Some(Restoring::by(RestoreMethod::StopRestoreStart)),
        components: vec![database],
        excludes: vec![FileSet::new("/srv/db", "*-shm")],
        ..Metadata::default()
    }
}

#[test]
fn a_whole_document_is_right_and_so_is_an_empty_one() {
    assert_eq!(document().check(), Ok(()));
    assert_eq!(Metadata::default().check(), Ok(()));
    assert!(document().component("main", "orders").is_some());
    assert!(document().component("", "orders").is_none());
}

#[test]
fn each_thing_that_nobody_could_restore_from_is_refused() {
    let broken = |change: fn(&mut Metadata)| {
        let mut document = document();
        change(&mut document);
        document.check().unwrap_err()
    };
    let undefined = broken(|document| document.restore_method = None);
    assert_eq!(undefined, MetadataError::NoRestoreMethod);
    let nameless = broken(|document| document.components[0].name.clear());
    assert_eq!(nameless, MetadataError::NoName);
    let double = broken(|document| document.components.push(document.components[0].clone()));
    assert_eq!(double, MetadataError::Duplicate("orders".into()));
    let wrong = broken(|document| document.components[0].files.push(FileSet::tree("/srv")));
    assert_eq!(wrong, MetadataError::WrongFiles("orders".into()));
    for change in [
        |document: &mut Metadata| document.excludes.push(FileSet::tree("srv")),
        |document: &mut Metadata| {
            document
                .exclude_from_snapshot
                .push(FileSet::tree("./cache"));
        },
        |document: &mut Metadata| document.components[0].log_files[0].path.clear(),
        |document: &mut Metadata| {
            document.components[0].database_files[0].alternate = Some("x".into());
        },
        |document: &mut Metadata| {
            document.alternate_locations.push(AlternateLocation {
                files: FileSet::tree("/srv"),
                to: "elsewhere".into(),
            });
        },
    ] {
        assert!(matches!(broken(change), MetadataError::NotAbsolute(_)));
    }
}

#[test]
fn what_a_document_leaves_out_has_the_safe_meaning() {
    let text = r#"{"components":[{"type":"database","name":"orders"}]}"#;
    let document: Metadata = serde_json::from_str(text).unwrap();
    let component = &document.components[0];
    assert!(component.selectable && component.notify_on_backup_complete);
    assert!(!component.selectable_for_restore && !component.backup_recovery);
    assert_eq!(document.usage, Usage::UserData);
    let files: FileSet = serde_json::from_str(r#"{"path":"/srv"}"#).unwrap();
    assert_eq!((files.spec.as_str(), files.recursive), ("*", false));
}
