/** Calls for tests: `runlane.harness.v1`, which only `runlane-server --harness` serves. */
export * from './gen/runlane/harness/v1/harness_service.js';
