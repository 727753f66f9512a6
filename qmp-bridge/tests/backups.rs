//! What a requester says after the set: that its backup is complete, or what it restores. Against the fake peers.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fakes;

use fakes::{Fault, World, until};
use guest_agent_wire::components::{ComponentOutcome, FilesRestored};
use guest_agent_wire::host::WriterOutcomes;
use guest_agent_wire::metadata::{
    Component, Dependency, Metadata, RestoreMethod, Restoring, WriterRestoreEvents,
};
use guest_agent_wire::types::{BackupType, WriterFailure, WriterState};
use qmp_bridge::error::Error;
use qmp_bridge::protocol::SetPreRestore;
use qmp_bridge::sets::backup::{build_on, parse_component};
use qmp_bridge::snapshot::document::{CreateRequest, Outcome, SetDocument, WriterRecord};
use serde_json::Value;
use std::time::Duration;

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

/// The agent has told them, and nobody heard that it did.
#[tokio::test]
async fn writers_whose_answer_was_lost_can_be_let_go_or_told_of_the_backups_end() {
    for deleted in [true, false] {
        let world = World::new();
        let late = Fault::Late(Duration::from_millis(1_500));
        world.agent.peer.on("post_snapshot", late);
        let document = world.create(full()).await;
        assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
        assert!(document.awaits_backup);
        let waits = || world.agent.guest.lock().unwrap().incomplete.len();
        until("writers to be told", || waits() == 1).await;
        let id = document.set.to_string();
        if deleted {
            world.sets().delete(&id, false).await.unwrap();
        } else {
            world.sets().complete(&id, true, Vec::new()).await.unwrap();
        }
        assert_eq!(waits(), 0);
    }
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
async fn every_kind_of_backup_is_told_with_the_stamps_that_it_builds_on_and_kept_in_the_document() {
    let world = World::new();
    let first = world.create(full()).await.set.to_string();
    for (word, kind) in [
        ("full", BackupType::Full),
        ("copy", BackupType::Copy),
        ("incremental", BackupType::Incremental),
        ("differential", BackupType::Differential),
        ("log", BackupType::Log),
    ] {
        let mut options = vec!["--type", word, "--component", "db=main/orders", "--json"];
        let builds_on = !matches!(kind, BackupType::Full | BackupType::Copy);
        if builds_on {
            options.extend(["--since", &first]);
        }
        let output = world.vmshadow_create(&options).output().await.unwrap();
        let document: SetDocument = serde_json::from_slice(&output.stdout).unwrap();
        let guest = world.agent.guest.lock().unwrap();
        assert_eq!(guest.backup_type, kind);
        let previous = &guest.picked[0].components[0].previous_stamp;
        assert_eq!(previous.as_deref(), builds_on.then_some("tuesday"));
        assert_eq!(document.request.backup_type, kind);
        let asked = &document.request.components[0].components[0];
        assert_eq!(asked.previous_stamp, *previous);
        let mut said = document.writers.iter().flat_map(WriterRecord::components);
        assert_eq!(said.next().unwrap().stamp.as_deref(), Some("tuesday"));
        // Nobody's history depends on a copy.
        assert_eq!(document.awaits_backup, kind != BackupType::Copy);
    }
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

/// Components and writers that are picked, components that are heard of, what they need and whether the set has it.
type Case = (
    &'static [&'static str],
    &'static [&'static str],
    &'static [&'static str],
    &'static [(&'static str, bool)],
);

/// A server with three databases; one depends on another of them, and on a component of a writer that is not there.
fn three_databases() -> Metadata {
    let mut orders = Component::database("main", "orders");
    for (class_id, logical_path, name) in [("db", "main", "customers"), ("ldap", "", "people")] {
        orders.dependencies.push(Dependency {
            class_id: class_id.to_owned(),
            logical_path: logical_path.to_owned(),
            name: name.to_owned(),
        });
    }
    Metadata {
        restore_method: Some(Restoring::by(RestoreMethod::RestoreIfCanReplace)),
        components: vec![
            orders,
            Component::database("main", "customers"),
            Component::database("", "log"),
        ],
        ..Metadata::default()
    }
}

/// A server with a database that has two parts, of which one can be restored alone, and settings that belong to every backup.
fn a_database_with_parts() -> Metadata {
    let part = |name: &str, alone| {
        let mut part = Component::database("main/orders", name);
        part.selectable = false;
        part.selectable_for_restore = alone;
        part
    };
    let mut settings = Component::file_group("", "settings");
    settings.selectable = false;
    Metadata {
        restore_method: Some(Restoring::by(RestoreMethod::RestoreIfCanReplace)),
        components: vec![
            Component::database("main", "orders"),
            part("today", true),
            part("history", false),
            settings,
        ],
        ..Metadata::default()
    }
}

#[tokio::test]
async fn components_are_picked_and_restored_by_the_rules_of_selectability() {
    let world = World::new();
    world
        .agent
        .change(|guest| guest.metadata = Some(Box::new(a_database_with_parts())));
    let picking = |components: &[&str]| CreateRequest {
        components: components
            .iter()
            .map(|text| parse_component(text).unwrap())
            .collect(),
        ..full()
    };
    // A part cannot be picked: the guest is not touched.
    let refused = world.create(picking(&["db=main/orders/history"])).await;
    assert_eq!(refused.outcome, Outcome::Failed);
    let why = refused.reason.unwrap().message;
    assert!(why.contains("it comes with main/orders"), "{why}");
    assert!(world.agent.guest.lock().unwrap().picked.is_empty());
    // What must come does, by its own name.
    let document = world.create(full()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    let picked = world.agent.guest.lock().unwrap().picked.clone();
    let names = picked.iter().flat_map(|picked| &picked.components);
    let names: Vec<_> = names.map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["orders", "settings"]);
    // A part is restored alone where its writer can.
    let id = document.set.to_string();
    let sets = world.sets();
    let of = |component: &str| SetPreRestore {
        components: vec![parse_component(component).unwrap()],
        ..restoring(&id, &[])
    };
    let refused = sets.restore(&of("db=main/orders/history")).await;
    let Err(Error::Usage(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(why.contains("it comes with main/orders"), "{why}");
    let (session, _) = sets.restore(&of("db=main/orders/today")).await.unwrap();
    session.end(FilesRestored::All).await.unwrap();
    let restores = world.agent.guest.lock().unwrap().restores.clone();
    let components = &restores[0].writers[0].components;
    assert_eq!(components.len(), 1);
    assert_eq!(components[0].name, "orders");
    assert_eq!(components[0].subcomponents, ["main/orders/today"]);
    // What came of itself has an outcome of its own.
    let mut outcomes = vec![WriterOutcomes {
        writer: "db".to_owned(),
        components: vec![ComponentOutcome {
            logical_path: "main/orders".to_owned(),
            name: "today".to_owned(),
            succeeded: false,
        }],
    }];
    let refused = sets.complete(&id, true, outcomes.clone()).await;
    assert!(matches!(refused, Err(Error::NotFound(_))), "{refused:?}");
    outcomes[0].components[0].logical_path.clear();
    "settings".clone_into(&mut outcomes[0].components[0].name);
    sets.complete(&id, true, outcomes).await.unwrap();
}

#[tokio::test]
async fn a_restore_of_components_is_theirs_alone_and_tells_what_they_depend_on() {
    let world = World::new();
    world
        .agent
        .change(|guest| guest.metadata = Some(Box::new(three_databases())));
    let document = world.create(CreateRequest::default()).await;
    let id = document.set.to_string();
    let sets = world.sets();
    let cases: [Case; 5] = [
        (&["db=log"], &[], &["log"], &[]),
        (
            &["db=main/orders"],
            &[],
            &["orders"],
            &[("db=main/customers", true), ("ldap=people", false)],
        ),
        (
            &["db=main/orders", "db=main/customers"],
            &[],
            &["orders", "customers"],
            &[("ldap=people", false)],
        ),
        (
            &["db=log"],
            &["db"],
            &["orders", "customers", "log"],
            &[("ldap=people", false)],
        ),
        (
            &[],
            &[],
            &["orders", "customers", "log"],
            &[("ldap=people", false)],
        ),
    ];
    for (picked, writers, heard, missing) in cases {
        let what = SetPreRestore {
            components: picked
                .iter()
                .map(|text| parse_component(text).unwrap())
                .collect(),
            ..restoring(&id, writers)
        };
        let (session, begun) = sets.restore(&what).await.unwrap();
        session.end(FilesRestored::All).await.unwrap();
        for said in &world.agent.guest.lock().unwrap().restores {
            let components = said.writers.iter().flat_map(|writer| &writer.components);
            let names: Vec<_> = components.map(|one| one.name.as_str()).collect();
            assert_eq!(names, heard, "{picked:?}");
        }
        let needs: Vec<_> = begun
            .needs
            .iter()
            .map(|need| (need.needs.as_str(), need.is_in_set))
            .collect();
        assert_eq!(needs, missing, "{picked:?}");
        assert!(
            begun
                .needs
                .iter()
                .all(|need| need.component == "db=main/orders")
        );
    }
    world.agent.change(|guest| guest.restores.clear());
    for picked in ["db=main/log", "db=orders", "web=main/orders"] {
        let what = SetPreRestore {
            components: vec![
                parse_component("db=log").unwrap(),
                parse_component(picked).unwrap(),
            ],
            ..restoring(&id, &[])
        };
        let refused = sets.restore(&what).await;
        let Err(Error::NotFound(text)) = refused else {
            panic!("{picked}: {refused:?}");
        };
        assert!(text.contains(&format!("no component {picked};")), "{text}");
        assert!(
            text.contains("db=main/orders, db=main/customers, db=log"),
            "{text}"
        );
    }
    assert!(world.agent.guest.lock().unwrap().restores.is_empty());
}

#[tokio::test]
async fn a_component_that_the_set_was_not_made_of_cannot_be_restored_from_it() {
    let world = World::new();
    world
        .agent
        .change(|guest| guest.metadata = Some(Box::new(three_databases())));
    let document = world.create(full()).await;
    let id = document.set.to_string();
    let what = SetPreRestore {
        components: vec![parse_component("db=log").unwrap()],
        ..restoring(&id, &[])
    };
    let refused = world.sets().restore(&what).await;
    let Err(Error::NotFound(text)) = refused else {
        panic!("{refused:?}");
    };
    assert!(text.ends_with("it has: db=main/orders"), "{text}");
    // Customers are in the writer's document, but not in the set.
    let (session, begun) = world.sets().restore(&restoring(&id, &[])).await.unwrap();
    session.end(FilesRestored::All).await.unwrap();
    let needs: Vec<_> = begun
        .needs
        .iter()
        .map(|need| (need.needs.as_str(), need.is_in_set))
        .collect();
    assert_eq!(
        needs,
        [("db=main/customers", false), ("ldap=people", false)]
    );
}

#[tokio::test]
async fn the_command_restores_components_and_tells_what_they_need() {
    let world = World::new();
    world
        .agent
        .change(|guest| guest.metadata = Some(Box::new(three_databases())));
    let document = world.create(CreateRequest::default()).await;
    let id = document.set.to_string();
    let one = [
        "restore",
        &id,
        "--component",
        "db=main/orders",
        "--json",
        "--",
        "true",
    ];
    let output = world.vmshadow(&one).output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["needs"][0]["component"], "db=main/orders");
    assert_eq!(answer["needs"][0]["needs"], "db=main/customers");
    assert_eq!(answer["needs"][0]["is-in-set"], true);
    assert_eq!(answer["needs"][1]["is-in-set"], false);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(
        told.contains("db=main/orders depends on db=main/customers, which is in the set and not restored with it"),
        "{told}"
    );
    let none = ["restore", &id, "--component", "db=nothing", "--", "true"];
    let output = world.vmshadow(&none).output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(
        told.contains("it has: db=main/orders, db=main/customers, db=log"),
        "{told}"
    );
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

#[tokio::test]
async fn complete_exits_1_if_a_writer_fails_at_it() {
    let world = World::new();
    let document = world.create(full()).await;
    let fails = (WriterState::FailedAtBackupComplete, WriterFailure::Timeout);
    world.agent.change(|guest| guest.fails = Some(fails));
    let id = document.set.to_string();
    let output = world.vmshadow(&["complete", &id]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let after = stored(&world, &document);
    let said = after.writers[0].complete.as_ref().unwrap();
    assert_eq!(said.state, WriterState::FailedAtBackupComplete);
    assert_eq!(said.failure.as_ref().unwrap().code, WriterFailure::Timeout);
    assert!(!after.awaits_backup);
}
