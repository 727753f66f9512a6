//! What a requester says after the set: that its backup is complete, or what it restores. Against the fake peers.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fakes;

use fakes::World;
use guest_agent_wire::components::FilesRestored;
use guest_agent_wire::metadata::{
    Component, Metadata, RestoreMethod, Restoring, WriterRestoreEvents,
};
use guest_agent_wire::types::BackupType;
use qmp_bridge::error::Error;
use qmp_bridge::protocol::SetPreRestore;
use qmp_bridge::sets::backup::{build_on, parse_component};
use qmp_bridge::snapshot::document::{CreateRequest, Outcome, SetDocument};
use serde_json::Value;

fn full() -> CreateRequest {
    CreateRequest {
        backup_type: BackupType::Full,
        components: vec![parse_component("db=main/orders").unwrap()],
        ..CreateRequest::default()
    }
}

fn restoring(id: &str, writers: &[&str]) -> SetPreRestore {
    SetPreRestore {
        id: id.to_owned(),
        writers: writers.iter().map(|name| (*name).to_owned()).collect(),
        ..SetPreRestore::default()
    }
}

fn told(world: &World, what: &str) -> usize {
    let what = format!("agent told {what}");
    world.log().iter().filter(|line| **line == what).count()
}

fn stored(world: &World, document: &SetDocument) -> SetDocument {
    let found = world.sets().find(&document.set.to_string()).unwrap();
    found.document()
}

#[tokio::test]
async fn writers_of_a_full_backup_are_told_complete_when_the_requester_says_so_and_once() {
    for succeeded in [true, false] {
        let world = World::new();
        let document = world.create(full()).await;
        assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
        assert!(document.awaits_backup);
        assert_eq!(told(&world, "complete") + told(&world, "failed"), 0);
        let id = document.set.to_string();
        let sets = world.sets();
        let after = sets.complete(&id, succeeded, Vec::new()).await.unwrap();
        assert_eq!(after.backup_succeeded, Some(succeeded));
        assert_eq!(told(&world, "complete"), usize::from(succeeded));
        assert_eq!(told(&world, "failed"), usize::from(!succeeded));
        assert_eq!(stored(&world, &document), after);
        let again = sets.complete(&id, true, Vec::new()).await;
        assert!(matches!(again, Err(Error::InvalidState(_))), "{again:?}");
    }
}

#[tokio::test]
async fn an_agent_that_was_started_anew_cannot_be_told_and_the_record_says_so() {
    let world = World::new();
    let document = world.create(full()).await;
    world.agent.change(|guest| guest.incomplete.clear());
    let id = document.set.to_string();
    let told = world.sets().complete(&id, true, Vec::new()).await;
    assert!(matches!(told, Err(Error::InvalidState(_))), "{told:?}");
    let after = stored(&world, &document);
    assert!(!after.awaits_backup);
    assert_eq!(after.backup_succeeded, Some(false));
}

#[tokio::test]
async fn a_deleted_set_lets_its_writers_go() {
    let world = World::new();
    let document = world.create(full()).await;
    let waits = || world.agent.guest.lock().unwrap().incomplete.len();
    assert_eq!(waits(), 1);
    world
        .sets()
        .delete(&document.set.to_string(), false)
        .await
        .unwrap();
    assert_eq!(waits(), 0);
}

#[tokio::test]
async fn the_next_backup_gets_the_stamps_of_the_last_one() {
    let world = World::new();
    let first = world.create(full()).await;
    let mut request = full();
    build_on(&mut request.components, &first);
    world.create(request).await;
    let guest = world.agent.guest.lock().unwrap();
    let component = &guest.picked[0].components[0];
    assert_eq!(component.previous_stamp.as_deref(), Some("tuesday"));
}

#[tokio::test]
async fn a_restore_gives_each_writer_back_what_it_had_stored_and_tells_how_it_went() {
    let world = World::new();
    let document = world.create(full()).await;
    let id = document.set.to_string();
    let sets = world.sets();
    let none = sets.restore(&restoring(&id, &["nobody"])).await;
    assert!(matches!(none, Err(Error::NotFound(_))));
    let what = SetPreRestore {
        additional_restores: true,
        options: "verify".to_owned(),
        ..restoring(&id, &["db"])
    };
    let (session, _) = sets.restore(&what).await.unwrap();
    // The VM is taken: another conversation would end that on which the restore lives.
    let busy = sets.restore(&restoring(&id, &[])).await;
    assert!(matches!(busy, Err(Error::SetInProgress { .. })));
    let busy = sets.complete(&id, true, Vec::new()).await;
    assert!(matches!(busy, Err(Error::SetInProgress { .. })));
    let busy = sets.delete(&id, false).await;
    assert!(matches!(busy, Err(Error::SetInProgress { .. })));
    // But for what a restore may be made of.
    world.storages[0].set_connected(false);
    sets.revert(&id).await.unwrap();
    session.end(FilesRestored::All).await.unwrap();
    let restores = world.agent.guest.lock().unwrap().restores.clone();
    let component = &restores[0].writers[0].components[0];
    assert_eq!(component.name, "orders");
    assert_eq!(component.stamp.as_deref(), Some("tuesday"));
    assert_eq!(component.metadata["label"], 5);
    assert!(component.additional_restores);
    assert_eq!(component.options, "verify");
    assert_eq!(component.restored, None);
    let component = &restores[1].writers[0].components[0];
    assert_eq!(component.restored, Some(FilesRestored::All));
}

#[tokio::test]
async fn a_writer_that_wants_no_restore_events_gets_them_only_if_it_is_named() {
    let world = World::new();
    let mut method = Restoring::by(RestoreMethod::RestoreIfCanReplace);
    method.writer_restore = WriterRestoreEvents::Never;
    let document = Metadata {
        restore_method: Some(method),
        ..Metadata::default()
    };
    world
        .agent
        .change(|guest| guest.metadata = Some(Box::new(document)));
    let document = world.create(CreateRequest::default()).await;
    let id = document.set.to_string();
    let sets = world.sets();
    for (named, heard) in [(Vec::new(), 0), (vec!["db"], 1)] {
        let (session, _) = sets.restore(&restoring(&id, &named)).await.unwrap();
        session.end(FilesRestored::All).await.unwrap();
        let restores = world.agent.guest.lock().unwrap().restores.clone();
        assert_eq!(restores[0].writers.len(), heard);
    }
}

#[tokio::test]
async fn a_component_that_asks_to_be_recovered_in_the_copy_is_noted() {
    let world = World::new();
    let mut component = Component::database("main", "orders");
    component.backup_recovery = true;
    let document = Metadata {
        components: vec![component],
        ..Metadata::default()
    };
    world
        .agent
        .change(|guest| guest.metadata = Some(Box::new(document)));
    let document = world.create(CreateRequest::default()).await;
    assert_eq!(document.outcome, Outcome::Kept);
    let noted = |note: &String| note.contains("orders") && note.contains("recover");
    assert!(document.notes.iter().any(noted), "{:#?}", document.notes);
}

#[tokio::test]
async fn the_command_completes_and_restores() {
    let world = World::new();
    let options = ["--type", "full", "--component", "db=main/orders", "--json"];
    let output = world.vmshadow_create(&options).output().await.unwrap();
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let id = document["set"].as_str().unwrap();
    let shown = world.vmshadow(&["show", id]).output().await.unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("vmshadow complete"), "{shown}");
    for (command, restored) in [("true", "ALL"), ("false", "FAILED"), ("/nowhere", "NONE")] {
        let arguments = ["restore", id, "--json", "--", command];
        let status = world.vmshadow(&arguments).output().await.unwrap().status;
        assert_eq!(status.success(), command == "true");
        let restores = world.agent.guest.lock().unwrap().restores.clone();
        let said = serde_json::to_value(&restores[1]).unwrap();
        let component = &said["writers"][0]["components"][0];
        assert_eq!(component["restored"], restored);
    }
    let other = ["complete", id, "--failed-component", "db=main/customers"];
    let refused = world.vmshadow(&other).output().await.unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(told(&world, "complete"), 0);
    let orders = ["complete", id, "--failed-component", "db=main/orders"];
    let done = world.vmshadow(&orders).output().await.unwrap();
    assert!(done.status.success());
    assert_eq!(told(&world, "complete"), 1);
    let outcomes = world.agent.guest.lock().unwrap().outcomes.clone();
    assert_eq!(outcomes[0].components[0].name, "orders");
    assert!(!outcomes[0].components[0].succeeded);
}

#[test]
fn a_component_is_given_as_text() {
    let picked = parse_component("sqlite:/srv=/srv/db/orders").unwrap();
    assert_eq!(picked.writer, "sqlite:/srv");
    assert_eq!(picked.components[0].logical_path, "/srv/db");
    assert_eq!(picked.components[0].name, "orders");
    assert_eq!(
        parse_component("db=orders").unwrap().components[0].logical_path,
        ""
    );
    for text in ["db", "=orders", "db=", "db=main/"] {
        assert!(parse_component(text).is_err(), "{text}");
    }
}
