"""The scripts: workflows W0 to W19 of the user guide, I1 to I8 of the guide for Claude Code."""

from typing import Any

from tests.support.old_guide import Script


def _of(session: str, **more: Any) -> dict[str, Any]:
    return {"session_id": session, **more}


SCRIPTS: dict[str, Script] = {
    "W0": Script(
        """
        frozen = await window_freeze(
            session_id="my-first-session",
            window_name="project-kickoff",
            description="How we begin with the widget",
            tags=["planning", "widget"]
        )
        assert frozen["success"] and frozen["token_count"] > 0
        # ... later
        result = await window_thaw(window_name="project-kickoff")
        assert result["success"] and {"partial", "warning"} <= result.keys()
        """,
        sessions=("my-first-session",),
        real_kv=True,
    ),
    "W1": Script(
        """
        await window_freeze(
            session_id="current-session",
            window_name="debug-session-jan23",
            description="The cause is the token refresh",
            tags=["debug", "auth"]
        )
        # ... time passes
        result = await window_thaw(
            window_name="debug-session-jan23"
        )
        print(f"{result['restoration_time_ms']} ms, {result['cache_hit']}, {result['cache_efficiency']}")
        """,
        sessions=("current-session",),
        real_kv=True,
    ),
    "W2": Script(
        """
        await window_freeze(
            session_id="exploration",
            window_name="before-experiment"
        )
        # ... exploration: approach A
        await window_freeze(
            session_id="exploration",
            window_name="approach-a",
            tags=["experiment", "approach-a"]
        )
        await window_thaw(window_name="before-experiment")
        # ... exploration: approach B
        await window_freeze(
            session_id="exploration",
            window_name="approach-b",
            tags=["experiment", "approach-b"]
        )
        found = await window_list(tags=["experiment"])
        assert {window["name"] for window in found["windows"]} == {"approach-a", "approach-b"}
        """,
        sessions=("exploration",),
        real_kv=True,
    ),
    "W3": Script(
        """
        result = await window_clone(
            source_window="my-project",
            target_window="my-project-for-alice",
            description="For Alice and her ideas on caching"
        )
        assert result["success"] and result["new_window_name"] == "my-project-for-alice"
        status = await window_status(window_name="my-project-for-alice", include_lineage=True)
        assert status["lineage"]["is_clone"] and status["lineage"]["root_window"] == "my-project"
        assert status["parent_window"] == status["window"]["parent_window"] == "my-project"
        assert result["lineage"] == ["my-project"]
        """,
        windows={"my-project": _of("owner")},
        real_kv=True,
    ),
    "W4": Script(
        """
        result = await window_list(
            tags=["project-x"]
        )
        assert [window["name"] for window in result["windows"]] == ["x-plan"]
        result = await window_list(
            tags=["debug"],
            sort_by="created_at",
            sort_order="desc",
            limit=5
        )
        assert result["count"] == 5 and result["total"] >= 6
        assert (result["page"], result["total_pages"], result["has_next"], result["has_prev"]) == (1, 2, True, False)
        largest = await window_list(sort_by="total_size_bytes")
        assert largest["windows"][0]["total_size_bytes"] == largest["windows"][0]["size_bytes"]
        """,
        windows={
            "x-plan": _of("organised", tags=["project-x"]),
            **{f"bug-{number}": _of("organised", tags=["debug"]) for number in range(6)},
        },
    ),
    "W5": Script(
        """
        auto_freeze_policy = {
            "enabled": True,
            "idle_timeout_minutes": 30,
            "token_threshold": 100000,
            "naming_pattern": "auto-{session_id}-{timestamp}"
        }
        result = await auto_freeze_config(policy=auto_freeze_policy)
        assert result["success"] and auto_freeze_policy.items() <= result["policy"].items()
        result = await auto_freeze_config(
            tags=["auto-freeze"], window_name_pattern="auto-{session_id}-{timestamp}-{count}", cooldown_seconds=60
        )
        assert "auto-freeze" in result["policy"]["tags"]
        """,
    ),
    "W6": Script(
        """
        health = await health_check()
        print(f"Status: {health['status']}")
        print(f"Uptime: {health['uptime_seconds']}s")
        metrics = await get_metrics_data(format="json")
        for metric in metrics['metrics']:
            print(f"{metric['name']}: {metric['value']}")
        """,
    ),
    "W7": Script(
        """
        active = await session_list(state_filter="active")
        frozen = await session_list(state_filter="frozen")
        status = await window_status(window_name="my-project")
        print(f"Token count: {status['token_count']}")
        print(f"Storage tier: {status['kv_cache']['storage_tier']}")
        """,
        sessions=("still-active",),
        windows={"my-project": _of("owner")},
        real_kv=True,
    ),
    "W8": Script(
        """
        result = await window_thaw(window_name="my-context")
        cache_salt = result['cache_salt']
        """,
        windows={"my-context": _of("sized")},
        real_kv=True,
    ),
    "W9": Script(
        """
        sessions = await session_list()
        status = await window_status(session_id="your-session-id")
        assert status["type"] == "session" and status["session"]["state"] == status["state"]
        """,
        sessions=("your-session-id",),
    ),
    "W10": Script(
        """
        try:
            await window_freeze(session_id="session", window_name="project")
        except Exception as error:
            assert "window_already_exists" in str(error)
        await window_freeze(
            session_id="session",
            window_name="project-v2",
        )
        await window_delete(window_name="project")
        await window_freeze(session_id="session", window_name="project")
        """,
        windows={"project": _of("session")},
    ),
    "W11": Script(
        """
        status = await window_status(window_name="common-base", include_blocks=True)
        print(f"{len(status['blocks'])} blocks, {status['kv_cache']['storage_tier']}")
        result = await window_thaw(window_name="common-base", warm_cache=True)
        assert result["blocks_found"] == result["blocks_expected"]
        """,
        windows={"common-base": _of("slow")},
        real_kv=True,
    ),
    "W12": Script(
        """
        health = await health_check(component="vllm")
        print(health['status'], health['message'])
        """,
    ),
    "W13": Script(
        """
        health = await health_check()
        if health['status'] != 'healthy':
            for component in health['components']:
                if component['status'] != 'healthy':
                    print(f"Issue with {component['name']}: {component['message']}")
        """,
    ),
    "W14": Script(
        """
        stats = await cache_stats()
        print(f"KV Store blocks: {stats['kv_store']['total_blocks']}")
        print(f"KV Store size: {stats['kv_store']['total_bytes'] / 1024 / 1024:.2f} MB")
        print(f"Hit rate: {stats['kv_store']['hit_rate']:.2%}")
        assert stats['kv_store']['total_size_bytes'] == stats['kv_store']['total_bytes']
        assert stats['vllm']['connected']
        """,
        windows={"stored": _of("stored")},
        real_kv=True,
    ),
    "W15": Script(
        """
        await window_freeze(
            session_id="sess-123",
            window_name="auth-module-debug-jan23",
            description="The cause of the failing refresh is in line 145",
            tags=["debug", "auth", "january", "project-auth", "experiment", "production", "wip"]
        )
        await window_freeze(
            session_id="sess-123",
            window_name="save1"
        )
        """,
        sessions=("sess-123",),
    ),
    "W16": Script(
        """
        old = await window_list(
            created_before="2026-01-01T00:00:00Z"
        )
        for window in old['windows']:
            if 'temporary' in window['tags']:
                await window_delete(window_name=window['name'])
        left = await window_list(session_id="untidy", sort_by="name", sort_order="asc")
        assert [window["name"] for window in left["windows"]] == ["kept", "new-and-temporary"]
        """,
        windows={"kept": _of("untidy"), "new-and-temporary": _of("untidy", tags=["temporary"])},
    ),
    "W17": Script(
        """
        status = await window_status(window_name="my-context")
        if status['token_count'] > 50000:
            print("Consider trimming this context")
        """,
        windows={"my-context": _of("sized")},
    ),
    "W18": Script(
        """
        await window_clone(
            source_window="stable-context",
            target_window="experiment-context"
        )
        await window_thaw(window_name="experiment-context")
        await window_delete(window_name="experiment-context")
        """,
        windows={"stable-context": _of("stable")},
        real_kv=True,
    ),
    "W19": Script(
        """
        health = await health_check()
        if health['status'] == 'healthy':
            await window_freeze(session_id="critical", window_name="before-the-migration")
        else:
            print("System degraded - consider waiting")
        """,
        sessions=("critical",),
    ),
    "I1": Script(
        """
        await window_freeze(
            session_id="dev-session", window_name="project-day-3", description="Auth", tags=["daily", "auth", "api"]
        )
        await window_thaw(window_name="project-day-3")
        """,
        sessions=("dev-session",),
    ),
    "I2": Script(
        """
        await window_freeze(
            session_id="project-setup", window_name="myproject-base", description="Read", tags=["base", "myproject"]
        )
        await window_clone(
            source_window="myproject-base", target_window="myproject-feature-x", description="Working on feature X"
        )
        clone = await window_clone(
            source_window="myproject-base", target_window="myproject-bugfix-123", description="Fixing bug #123"
        )
        assert clone["tags"] == ["base", "myproject"] and clone["message"]
        """,
        sessions=("project-setup",),
        real_kv=True,
    ),
    "I3": Script(
        """
        await window_freeze(
            session_id="review", window_name="pr-456-review", description="Three issues", tags=["review", "pr-456"]
        )
        await window_thaw(window_name="pr-456-review")
        """,
        sessions=("review",),
    ),
    "I4": Script(
        """
        check = await auto_freeze_check(session_id="my-session", token_count=80000, prompt_prefix="")
        assert check["success"] and not check["triggered"]
        await window_freeze(
            session_id="my-session",
            window_name="auto-save-20260123-101500",
            description="Saved when the session ended",
            tags=["auto-save"],
            prompt_prefix="",
        )
        """,
        sessions=("my-session",),
    ),
    "I5": Script(
        """
        found = await window_list(created_before="2026-01-01T00:00:00Z", tags=["auto-saved"])
        assert found["windows"] == [], "they are newer"
        gone = await window_delete(window_name="auto-save-old", force=True, delete_blocks=True)
        assert gone["success"] and isinstance(gone["blocks_deleted"], int) and "space_freed_bytes" in gone
        await window_clone(source_window="feature-complete", target_window="archive-feature-v1", tags=["archive", "v1"])
        """,
        windows={
            "auto-save-old": _of("hygiene", tags=["auto-saved"]),
            "feature-complete": _of("hygiene", tags=["feature"]),
        },
    ),
    "I6": Script(
        """
        health = await health_check()
        found = await window_list(tags=["myproject"], sort_by="created_at", sort_order="desc", limit=5)
        stats = await cache_stats()
        assert health["success"] and found["success"] and stats["success"]
        """,
    ),
    "I7": Script(
        """
        result = await window_thaw(window_name="checkpoint", continuation_prompt="Let us go on...")
        print(result["continuation"]["message"]["content"])
        """,
        windows={"checkpoint": _of("s1", tags=["wip"])},
        real_kv=True,
    ),
    "I8": Script(
        """
        found = await window_list(search="project", session_id="", model="", tags=[])
        metrics = await get_metrics_data(format="json")
        """,
    ),
}  # fmt: skip
